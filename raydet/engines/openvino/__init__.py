"""OpenVINO: a checkpoint or an exported graph → detections on the CPU."""
