"""How residual prompt tuning sits in PEFT: registration, and what a batch goes through with a prompt in front."""
