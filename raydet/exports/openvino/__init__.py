"""A checkpoint → an OpenVINO graph in float, or in INT8 with a proof of its AP and speed."""
