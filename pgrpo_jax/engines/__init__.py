"""Floor 4: where the roles run. An engine takes work and weights in and gives events out: publish, submit, poll, close."""
