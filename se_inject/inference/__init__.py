"""A quick copy of a model: `optimize_for_inference`, and programs of it: `export`.

In: a model, injected or not. Out: a copy with the same outputs up to rounding, and a report.
Read `optimize` (the way of one call), `fold_norms`, `gate_layers` (a block as a few matrices), `upstream` (a cheaper tensor to
squeeze), `merged_layers`, `inline` (several forwards in one graph), `in_place`, `forward_class`; then `report`, `export`.
"""
