"""Tables of labelled boxes, as Azure ML's data labelling exports them, and what detectors are trained from."""
