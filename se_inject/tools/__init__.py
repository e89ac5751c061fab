"""What is measured and shown: the benchmark, the zoo, the demonstration, scripts.

In: names of models. Out: tables.
Read `timing` and `variants`, `bench`, `bench_tables`; `zoo`, `zoo_table`; `demo`; `run_script`.
"""
