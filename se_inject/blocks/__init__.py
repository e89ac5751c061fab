"""What is put into a model: the squeeze-and-excitation block, timm's other attention modules, and one's own.

In: an `SEConfig` and the channels of a site. Out: an `nn.Module`, an identity at the start. Nothing here knows of traces.
Read `squeeze_excite` (the paper's block), `identity` (why it starts as 1), `catalogue` (all blocks by name), then
`autograd` (the same block's training step in fewer passes) and `gather_excite` (a block that timm cannot make).
"""
