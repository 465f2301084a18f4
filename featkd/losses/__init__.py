"""What the paper computes, one file an equation.

- `attention`: G^s and G^c, the attention maps, and M, the masks made of them
- `transfer`: L_AT, eq. (1)
- `masked`: L_AM, eq. (2)
- `relation`: r, the four relations; `non_local_block`: with theta, phi and g
- `non_local`: L_NLD
- `overall`: alpha L_AT + beta L_AM + gamma L_NLD over the levels
"""
