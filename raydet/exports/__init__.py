"""Tables and checkpoints → the formats of others, and the Hub."""
