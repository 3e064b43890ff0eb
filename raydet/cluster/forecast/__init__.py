"""`plan`: a measured run and a cluster → time, cost and bottleneck of a larger run. Nothing is started."""
