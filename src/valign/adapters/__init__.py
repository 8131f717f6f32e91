"""Parameter-efficient methods: initialisers and peft tuners, one file per method."""
