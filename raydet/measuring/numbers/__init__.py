"""Columns of boxes → matches, and the exact metrics of COCO, VOC and LVIS computed from them."""
