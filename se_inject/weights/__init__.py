"""Files: `save` and `load`.

In: a model, or files of weights. Out: a safetensors file with the recipe that rebuilds the model, or the model.
Read `recipe` (what a file says), `reading`, `writing`, `strict` (which tensors a file may lack), `files` (the doors).
"""
