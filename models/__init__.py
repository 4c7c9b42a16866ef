"""The network of the paper, part by part: see wsid_net.py for how the parts meet."""
