"""Training of the bundled models; nothing else imports it."""
