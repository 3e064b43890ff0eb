"""Steps that went wrong and settings that the user changed in mid-run → what a run does from then on."""
