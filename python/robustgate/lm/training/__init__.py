"""Training experts, and the record of what each was trained on."""
