"""Tables of images, detections and evaluated runs → a page on this machine to look through them."""
