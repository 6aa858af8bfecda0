"""The deployed policy behind a server. Import its modules by name: each is heavy.

Here is what servers of both protocols need: what is served and by which contract, its life, weights, text and metrics.
`grpc` puts the engine behind JetStream's orchestrator and service, `http` behind what OpenAI's clients speak.
"""
