"""A cluster.yaml with nothing wrong, to spoil. `PORT` stands for a free port."""

GOOD = """
name: demo
models: [{name: tiny, path: tiny}]
nodes:
  - {name: a, accelerator: a100-80g}
  - {name: b, accelerator: h100}
replicas:
  - {role: prefill, kv_blocks: 64, pace: {shape: llama-3.1-8b, accelerator: h100}}
  - {role: decode, count: 3, kv_blocks: 64, pace: {shape: llama-3.1-8b, accelerator: a100-80g}}
gateway: {port: PORT, allow_anonymous: true}
"""
