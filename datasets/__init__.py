"""Reading of photographs, labels, ground-truth masks and pseudo labels.

labels       Sample: a photograph with its classes, its count and its ground-truth mask
sources      the values of --data: detects the layout and merges sources
labels_csv, voc, coco, ilso   one reader per layout
photographs, unread           matching of file names; warnings about unsupported label files
images, pixels, listing       decoding of photographs; lists of image files
masks        instance masks, saliency maps and run-length encoding
transforms   photographs as network inputs
training     the training set of photographs and pseudo labels
loader       reproducible batches, resumable at any iteration
check        python -m datasets.check: the content and the problems of a data folder
make_voc_sid python -m datasets.make_voc_sid: the benchmark VOC-SID
"""
