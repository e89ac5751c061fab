"""Back to plain timm, by cross-layer rescaling: a constant gate is a factor on each channel, and weights take it in.

In: an injected model, and for `fold` and `gates` images. Out: a base model, or weights that a native timm model loads; for
`gates` a report alone.
Read `fold` first: it takes the `batches`, finds the blocks (`gates`), measures their gates (`gate_statistics`), replaces them
(`replacement`) and checks the result (`proof`). Then `absorb`, the search for the weights, which uses `operator_rules` and
`element_labels`; then `native`, which uses the same search to find timm's own twin. `report` is what `fold` returns.
`read_gates` measures the same gates for a `gate_report`, and changes nothing.
"""
