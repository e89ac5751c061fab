"""Where blocks go. A model is never changed here.

In: a `TracedModel` and an `SEConfig`. Out: a `Plan` of `Site`s, and for each site its `Place`.
A *candidate* is a pattern in one forward. A *unit* is a candidate that counts in the whole model: the outermost, or one
whose author left an empty slot. A *place* is the value in a unit that a block gates. A *site* is a place as plain data.
Read `patterns` (candidates), `attention` and `slots`, `units`, `places` (data), `placement`, `stages`, `sites`; then `plan` and
`diagram`.
"""
