"""The network of the paper and the fusion of its maps into instances: wsid_net.py puts the network together."""

METHODS = ("wsid", "components")  # the fusion of the paper; or connected components of S, a baseline
STUDENT = "mask_rcnn"  # the kind of a weights file of models.mask_rcnn, and the name of its method in tables
AMP = ("auto", "bf16", "off")  # the network in bfloat16: where that is faster, always, never
MAX_INSTANCES = 254  # instances that a label map can hold: 0 is background, 255 void
