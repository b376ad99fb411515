"""What a machine has: its processor's number formats. Reads nothing but the machine; other rooms ask here."""
