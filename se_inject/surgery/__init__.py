"""Blocks are put into a model and taken out: `plan`, `inject`, `eject`.

In: a model and the sites of `find`. Out: the same model, whose owners call their blocks.
Read `pipeline` (the path of one call), `session` (a traced model), `jobs` (the work at one owner), `state` (what is kept),
`edits` (a block in a graph, and out again), `codegen` and `generated_class` (an owner's new forward and class),
`sequential`, `refusals`; then `parts` and `load_hooks` for loading, `layer_decay` and `freezing` for training.
"""
