"""What every kernel is compiled with."""

# A product and the sum it goes into are one instruction, rounded once. Triton's own default will be
# two from 3.10 on.
FMA = {"enable_fp_fusion": True}
