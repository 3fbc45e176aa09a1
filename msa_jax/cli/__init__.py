"""What the commands share: flags, log lines, and errors as one sentence."""
