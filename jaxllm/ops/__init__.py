"""Operations on arrays: einsum, attention cores, losses."""
