"""What a trace means: which operators there are, what depends on what, who shares memory.

In: a recorded run. Out: a `TracedModel` with a `ModuleGraph` for each module that composes others, and answers about nodes.
Read `ops` (one row for each operator) and `layers`, `branches` (of a forward, by size), `module_graph` (one forward),
`value_flow` (values across forwards), then `aliasing` (memory).
"""
