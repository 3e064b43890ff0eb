"""Images and labels → detections of OWL-ViT, OWLv2 and Grounding DINO."""
