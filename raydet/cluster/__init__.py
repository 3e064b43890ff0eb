"""The Ray cluster of a job: session, shares, tasks and settings go in, records, metrics and logs come out."""
