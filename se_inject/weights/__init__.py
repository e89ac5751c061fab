"""Files: `save` and `load`.

In: a model, or files of weights. Out: a safetensors file with the recipe that rebuilds the model, or the model.
Read `recipe` (what a file says of its model), `reading`, `replacing` and `writing` (files), `digest` (on which base blocks
stand), `rebuild` (from what a file says to a model without its weights), `strict` (which tensors a file may lack), `files`
(the doors).
"""
