"""Reading what the scripts work on: photographs, labels, ground-truth masks and pseudo labels."""
