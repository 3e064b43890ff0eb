"""Boxes of one image after the other → matches, and the exact numbers of COCO, VOC and LVIS from them."""
