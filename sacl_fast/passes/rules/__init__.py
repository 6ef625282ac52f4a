"""What becomes of each operator of a recorded pass when its batch norms are fused.

A rule is given the writer (``passes.fusion``), the old node and its arguments, and gives the node's
value, or NotImplemented.
"""

from sacl_fast.ops import (
    norm_act,
    norm_depthwise,
    norm_pointwise,
    norm_slim_add,
    norm_slim_gate,
    slim_border,
)

norm_pointwise.register()
# Asked for the first time, each tells PyTorch of its operators, whose names the rules have.
for _operator in (norm_act, norm_depthwise, norm_slim_add, norm_slim_gate, slim_border):
    assert _operator.is_compiled()

from sacl_fast.passes.rules import additions, backward, border, forward  # noqa: E402, F401
