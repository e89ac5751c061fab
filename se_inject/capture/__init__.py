"""A model as data: what it calls, with which shapes, and what each forward computes. Nothing here knows of SE.

In: a model, and a size or inputs. Out: a `Call` tree of one recorded run, and for each module its own forward as an fx graph
whose nodes hold their values on the meta device. The model is not changed.
Read `snapshot` (puts the model on meta, and restores it) with its `containers`, `example` and `inputs` (what it is run on),
`calls` and `recording`, `forward` (trace one module) with its `arguments`, `author_code` and `side_effects`, and `graphs`; then
`meta_ops`, `tracer` and `fingerprint`, which make it quick, `known_values` (for models that read values), `channels`, which
follows axes through the run, `trail`, which proves a trace, and `values` (compares outputs).
"""
