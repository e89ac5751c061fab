"""A fast copy of a model: `optimize_for_inference`; and programs of a model: `export`.

In: a model, injected or not. Out: a copy with the same outputs up to rounding, and a report.
Read `optimize` (one call, step by step), `fold_norms`, `apply_folds`, `find_blocks` (which blocks become gates), `gate_layers`
(a gate as a few layers on vectors), `upstream` (a cheaper tensor to squeeze), `affine` and `merged_layers` (weights for these
two), `rewritable` and `regions` (which forwards are rewritten), `inline` (several forwards as one graph), `in_place`,
`scaled_weights` (a gate in the weights of the next layer), `forward_class`, `programs`; then `report`, `export`.
"""
