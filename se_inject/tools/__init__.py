"""The tools behind `se-inject bench`, `zoo`, `gates`, `demo` and `run`: they use the package, and nothing of it uses them.

In: names of models, or a script. Out: reports and tables, as plain data and as text. Read `timing`, `memory`, `machine`,
`outputs` and `variants`, then `bench_report`, `bench` and `bench_tables`; `zoo_table`, then `zoo`; `image_folder`,
`channel_maps`, `gate_plots`, `gate_page` and `gate_files`; `demo`; `run_script`.
"""
