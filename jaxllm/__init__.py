"""jaxllm: large language models in JAX/Flax, exact at every position and fast.

Shape letters, used as suffixes of array names and in einsum strings everywhere:

  B batch            T query length        S key/value length (cache)   D model width (embed_dim)
  N query heads      K key/value heads     G query heads a kv head, N = K*G
  H head dim         R rotary dim          F hidden width of the MLP    V vocabulary      L layers
"""

__version__ = "0.1.0"
