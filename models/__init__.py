"""The network of the paper, part by part: see wsid_net.py for how the parts meet."""

METHODS = ("wsid", "components")  # the fusion of the paper; or connected components of S, a baseline
AMP = ("auto", "bf16", "off")  # the network in bfloat16: where it pays, always, never
MAX_INSTANCES = 254  # instances that a label map can hold: 0 is background, and 255 void
