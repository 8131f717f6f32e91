"""The guard and a model behind HTTP: the routes of OpenAI's clients, keys and limits, metrics, and a log that shows tampering."""
