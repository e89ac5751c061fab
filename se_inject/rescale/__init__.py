"""Back to plain timm: `fold` and `to_native`. Both are cross-layer rescaling.

A gate that is constant is a factor for each channel, and a factor goes into the weights before or behind it.
In: an injected model (and images). Out: a base model, or weights that a native timm model loads.
Read `gates` (a block's gate and where it stands), `element_labels` (which factor each element has), `operator_rules`,
`absorb` (the weights that take a factor in), then `fold`, `native` and `report`.
"""
