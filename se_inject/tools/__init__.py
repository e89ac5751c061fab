"""The tools behind `se-inject bench`, `zoo`, `demo` and `run`: they use the package, and nothing of it uses them.

In: names of models, or a script. Out: reports and tables, as plain data and as text. Read `timing`, `memory`, `machine`,
`outputs` and `variants`, then `bench_report`, `bench` and `bench_tables`; `zoo_table`, then `zoo`; `demo`; `run_script`.
"""
