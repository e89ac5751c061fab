"""What is put into a model: the squeeze-and-excitation block, timm's other attention modules, and blocks of your own.

In: an `SEConfig`, and the channels, layout and style of a site. Out: an `nn.Module`, an identity at the start. Nothing
here knows of traces. Read `squeeze_excite` (the paper's block), `film` (the same with a shift), `identity` (how a block
starts as an identity), `catalogue` (all blocks by name, one row each), `build` (the block of one site), `start` (how a block
gets its first values back); then `autograd` (the training step of SE in fewer passes) and `gather_excite` (a block that timm
cannot create).
"""
