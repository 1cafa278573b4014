"""What each published method has to show to be accepted, and the tests that show it, or why none does.

A row is one check: what it says, and tests as "file::function".  `reason` stands where a check, or a part of one, has no test.
The rows follow the methods: GLM-130B, rotary positions, RoPE as a number system, ALiBi, mixed precision, norms, DeepNet, gates.
"""

import ast
import dataclasses
import functools
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LATER = "not part of what is built yet"


@dataclasses.dataclass(frozen=True)
class Row:
  says: str
  tests: tuple[str, ...] = ()
  reason: str = ""


def row(says, *tests, reason=""):
  return Row(says, tests, reason)


GLM = {
  "GLM-130B: size": row(
    "128.70 B parameters, counted from shapes", "test_wiring.py::test_the_size_of_glm_130b"
  ),
  "GLM-130B: DeepNorm": row(
    "alpha 11.8322, beta 0.0845 at 70 layers; v, o and the feed-forward start at Xavier times beta, q and k at 1, within 3 %",
    "test_wiring.py::test_published_coefficients",
    "test_wiring.py::test_deepnorm_starts_as_xavier_with_gain_beta",
  ),
  "GLM-130B: block": row(
    "two and more layers against a torch port of the published formulas, 2e-5",
    "parity/test_glm.py::test_the_block_of_glm_130b",
  ),
  "ChatGLM-6B: mask and positions of a prompt": row(
    "of [5, 74874, 130001, 130004]: what is blocked, and [[0,1,2,2],[0,0,0,1]]",
    "ops/test_masks.py::test_the_mask_of_the_published_prompt",
    "position/test_rope_2d.py::test_the_published_prompt",
  ),
  "GLM-130B: prefix": row(
    "a changed token of the prefix moves what is before it, one after the prefix does not",
    "nn/test_blocks.py::test_a_changed_token_of_the_prefix_moves_earlier_logits_and_one_after_it_does_not",
    "nn/test_blocks.py::test_a_prefix_is_seen_from_both_sides",
  ),
  "GLM-130B: layer scaling": row(
    "the same logits to 1e-5, and scores within float16 where they would be above 65504",
    "nn/test_blocks.py::test_layer_scaling_keeps_float16_finite",
    "nn/test_blocks.py::test_a_scanned_layer_knows_its_number",
  ),
  "GLM-130B: embedding gradient": row(
    "the forward pass bit for bit, a tenth of the gradient on the embedding (and tied head), nothing else changed",
    "nn/test_blocks.py::test_a_shrunk_embedding_gradient_is_a_tenth_and_nothing_else_changes",
    "nn/test_blocks.py::test_shrinking_keeps_every_bit",
  ),
  "GLM-130B: weights in 8 and 4 bits": row(
    "rounding within half a scale, packing bit for bit", reason=f"quantization is {LATER}"
  ),
  "GLM-130B: utilisation": row(
    "32.36 % MFU and 43.0 % HFU from the formula", reason=f"counting FLOPs is {LATER}"
  ),
  "GLM-130B: blank infilling": row(
    "targets are the shuffled spans, no loss on the text around them",
    reason=f"that training objective is {LATER}",
  ),
}
ROPE = {
  "RoPE: shifts": row(
    "q . k depends on the distance only, and rotations keep norms",
    "position/test_rope_hooks.py::test_inner_products_depend_on_the_distance_only",
    "position/test_rope_hooks.py::test_rotations_keep_the_norm",
    "position/test_rope_properties.py::test_inner_products_know_the_distance_only",
    "position/test_rope_properties.py::test_a_turned_pair_is_a_complex_product",
    reason="1e-6 of |q||k| to position 2^31 and not float64's 1e-11: rotations are in float32, by exact angles",
  ),
  "RoPE: golden vectors": row(
    "(0, 1, 2, 3) at position 1 in both layouts, which are one up to a permutation",
    "position/test_rope_hooks.py::test_golden_vector",
    "position/test_rope_hooks.py::test_layouts_are_equal_by_permutation",
  ),
  "RoPE: Jacobian and kernel": row(
    "an orthogonal Jacobian; constant queries and keys have a Toeplitz kernel",
    "position/test_rope_kernel.py::test_the_jacobian_is_orthogonal_and_the_same_everywhere",
    "position/test_rope_kernel.py::test_the_kernel_of_constant_queries_and_keys_is_toeplitz",
  ),
  "RoPE scalings: first and last frequency": row(
    "ratios to 1e-12; exponent 1 of mixed is fixed and 0 is PI",
    "position/test_rope_frequencies.py::test_highest_and_lowest_frequency_ratios",
    "position/test_rope_frequencies.py::test_ntk_mixed_is_fixed_at_exponent_one_and_pi_at_zero",
    "position/test_rope_properties.py::test_the_ends_of_ntk",
  ),
  "RoPE scalings: transformers": row(
    "frequencies to 1e-6, temperatures, and the logits of a random Llama three times beyond its length",
    "position/test_rope_frequencies.py::test_equal_to_transformers",
    "position/test_transformers_rope.py::test_rotated_queries_and_keys_of_llama",
    "parity/test_llama.py::test_logits",
  ),
  "YaRN: constants": row(
    "ranges (16, 41) and (20, 46), five temperatures, critical dimension 92",
    "position/test_rope_frequencies.py::test_yarn_correction_range",
    "position/test_rope_frequencies.py::test_yarn_scales",
    "position/test_rope_kernel.py::test_the_critical_dimension_of_llama_2",
    "position/test_rope_properties.py::test_the_scale_of_yarn_multiplies_what_is_turned",
  ),
  "Dynamic NTK: cache": row(
    "RoPE up to the trained length bit for bit; decoding is the full pass; keys rotated before the cache are not",
    "position/test_rope_frequencies.py::test_dynamic_ntk_is_rope_up_to_the_trained_length",
    "position/test_rope_properties.py::test_a_query_turns_by_the_frequencies_of_its_own_length",
    "nn/test_decoding.py::test_chunks_give_the_full_forward_pass",
    "test_sabotage.py::dynamic_ntk_with_rotated_keys_in_the_cache",
  ),
  "RoPE: decay bound": row(
    "seven printed numbers at d = 128, the last above the one before",
    "position/test_rope_kernel.py::test_the_bound_decays_with_distance_but_not_monotonically",
  ),
  "RoPE: traced positions and float32 angles": row(
    "a traced position gives what the batch gives, bit for bit; half types keep exact angles",
    "position/test_exact_angles.py::test_shapes_of_positions_and_a_loop",
    "position/test_exact_angles.py::test_within_the_bound_at_every_position",
    "nn/test_mixed_precision.py::test_angles_are_float32_and_positions_never_half",
  ),
  "Sinusoids: a shift is linear": row(
    "PE(p + k) = M_k PE(p) with blocks of turns",
    "position/test_bias_properties.py::test_a_shift_of_sinusoids_is_a_turn_of_each_pair",
    "position/test_absolute.py::test_exact_at_every_position",
  ),
}
BETA = {
  "Base beta: digits": row(
    "1749 in bases 10, 16 and 13; a digit is a RoPE angle without its fraction",
    "position/test_beta.py::test_1749",
    "position/test_beta.py::test_a_digit_is_a_rope_angle_without_its_fraction",
  ),
  "Base beta: conversion": row(
    "a base times the factor is NTK, to 1e-12; every row of the table of scalings",
    "position/test_beta.py::test_a_larger_base_is_ntk",
    "position/test_rope_frequencies.py::test_ntk_old_is_rope_with_a_larger_base",
    "position/test_rope_frequencies.py::test_equal_to_the_published_formula_at_fifty_digits",
  ),
  "ReRoPE and leaky ReRoPE: two products": row(
    "one rotation a pair of tokens in float64, decoding from unrotated keys",
    "position/test_scores_hook.py::test_one_rotation_a_pair",
    "position/test_scores_hook.py::test_scores_of_any_tile_and_of_one_decoded_row",
    "position/test_scores_hook.py::test_an_off_by_one_window_is_caught",
    reason="1e-5 of scores of size 10, and not float64's 1e-12: products are accumulated in float32",
  ),
  "ReRoPE and leaky ReRoPE: limits": row(
    "a window as long as the text and leak 1 are RoPE, an endless leak is ReRoPE",
    "position/test_scores_hook.py::test_a_window_as_long_as_the_sequence_is_rope",
    "position/test_scores_hook.py::test_fields_that_make_a_method_rope",
    "position/test_scores_hook.py::test_leaky_rerope_leads_from_rope_to_rerope",
  ),
  "log-n: factors": row(
    "1, 1.000313 and 4/3 at 512, 513 and 4096",
    "position/test_query_scale.py::test_factors_at_train_length_512",
    "position/test_bias_properties.py::test_log_n_is_the_logarithm_to_the_trained_length",
  ),
  "Length extrapolation: what is scored": row(
    "the repeated text is an exact tile; both texts count the same tokens",
    "evaluate/test_windows.py::test_a_repeated_block_is_an_exact_tile_that_ends_as_the_window_does",
    "experiments/test_sweep_groups.py::test_a_cell_is_what_the_model_alone_gives",
  ),
  "Length extrapolation: order of methods": row(
    "on a model trained at 128 and tested at 1024: NTK before none, YaRN before NTK, ReRoPE before YaRN",
    "experiments/test_recorded_results.py::test_the_order_of_methods_at_eight_times_the_trained_length",
    "experiments/test_recorded_results.py::test_rerope_stays_at_its_loss_within_the_length_and_alibi_does",
    "experiments/test_recorded_results.py::test_log_n_at_test_time_lowers_every_ntk_form_and_rerope",
    reason="eight minutes of training are not a test: the numbers are those recorded by experiments.length_extrapolation",
  ),
}
ALIBI = {
  "ALiBi: slopes": row(
    "the published recipe for 1 to 128 heads, written out for 8, 12 and 40",
    "position/test_alibi.py::test_slopes_of_the_published_recipe",
    "position/test_alibi.py::test_slopes_written_out",
    "position/test_bias_properties.py::test_slopes_fall_within_each_part_and_never_leave_0_to_1",
  ),
  "ALiBi: bias": row(
    "four tokens and two heads written out; 0 on the diagonal, falling with distance",
    "position/test_alibi.py::test_bias_written_out",
    "position/test_alibi.py::test_zero_on_the_diagonal_and_falling_with_distance",
  ),
  "ALiBi: shifts": row(
    "a shift changes no bit; slope times key position is the same attention",
    "position/test_alibi.py::test_shift_changes_no_bit",
    "position/test_bias_properties.py::test_attention_of_alibi_is_that_of_slope_times_key_position",
  ),
  "ALiBi: BLOOM and MPT": row(
    "their slopes; MPT orders what it takes otherwise and comes to the same list for every head count",
    "position/test_transformers_rope.py::test_alibi_of_bloom",
    "position/test_alibi.py::test_bloom_and_mpt_follow_the_same_recipe",
    "position/test_alibi.py::test_mpt_with_another_bias_max",
  ),
  "ALiBi: after the scaling": row(
    "added after the division by sqrt(H); divided too it is another result",
    "position/test_alibi.py::test_scores_add_the_bias_after_the_scaling",
    "test_sabotage.py::alibi_bias_divided_by_the_root_of_head_dim",
  ),
  "ALiBi: trained short, tested long": row(
    "the loss at eight times the trained length is that within it",
    "experiments/test_recorded_results.py::test_rerope_stays_at_its_loss_within_the_length_and_alibi_does",
    reason="the recorded sweep shows it; training is not a test",
  ),
  "ALiBi: cache and shards": row(
    "decoding is the full pass",
    "nn/test_decoding.py::test_chunks_give_the_full_forward_pass",
    "position/test_alibi.py::test_a_decoded_row_is_the_row_of_the_full_bias",
    reason=f"heads split over devices are {LATER}",
  ),
}
PRECISION = {
  "Half types: positions stay apart": row(
    "as many rotations as positions at 4096 and 32768; cosines of float32 and no integer in a half type, on the trace",
    "position/test_exact_angles.py::test_all_of_a_long_context_are_distinct",
    "nn/test_mixed_precision.py::test_angles_are_float32_and_positions_never_half",
    "nn/test_mixed_precision.py::test_casting_a_tree_to_bfloat16_leaves_frequencies_alone",
  ),
  "Half types: cosines": row(
    "within one rounding of float64 at every position below 4096, 2.0 off by rounded angles",
    "nn/test_mixed_precision.py::test_turned_bfloat16_queries_are_rounded_once",
  ),
  "Half types: shifts": row(
    "q . k moves by at most .005 of |q||k| after 3000 tokens; a model's logits likewise",
    "position/test_rope_hooks.py::test_bfloat16_queries_keep_float32_angles",
    "nn/test_shift.py::test_bfloat16",
  ),
  "Half types: ALiBi": row(
    "the last 64 of 4096 keys differ, where slope times key position leaves 4; decoding adds the same bits",
    "position/test_alibi.py::test_the_nearest_keys_stay_distinct_in_bfloat16",
    "position/test_alibi.py::test_a_decoded_row_is_the_row_of_the_full_bias",
    "position/test_bias_properties.py::test_the_bias_of_alibi",
  ),
  "Half types: the bug itself": row(
    "positions in a half type fail each of these: 641, 769 and 3073 are left",
    "nn/test_mixed_precision.py::test_how_many_positions_a_half_type_has",
    "nn/test_mixed_precision.py::test_rounded_positions_show_in_the_trace",
    "position/test_exact_angles.py::test_the_wrong_ways_are_caught",
    "nn/test_shift.py::test_rounded_positions_are_caught",
    "test_sabotage.py::alibi_from_the_first_key_in_bfloat16",
  ),
}
NORMS = {
  "Norms: invariances": row(
    "the table of Zhang and Sennrich, 18 entries in float64",
    "test_norm.py::test_invariances",
    "test_layer_properties.py::test_norms_do_not_know_the_scale",
    "test_layer_properties.py::test_a_layer_norm_does_not_know_the_mean_and_an_rms_norm_does",
  ),
  "Norms: no mean": row(
    "a layer norm of rows without a mean is an RMS norm",
    "test_norm.py::test_a_layer_norm_of_rows_without_mean_is_an_rms_norm",
  ),
  "Norms: torch and transformers": row(
    "1e-6 in float32, the bits in bfloat16, and the other order of cast and gain has other bits",
    "parity/test_norms.py::test_functions",
    "parity/test_norms.py::test_modules",
    "parity/test_norms.py::test_bits_in_bfloat16",
    "parity/test_norms.py::test_the_other_order_has_other_bits",
  ),
  "Norms: eps": row("inside the root: .0316 and not .909", "test_norm.py::test_eps_is_inside_the_root"),
  "Norms: large mean": row(
    "mean 1e4, standard deviation 1",
    "test_norm.py::test_norm",
    "parity/test_oracle.py::test_layer_norm_of_a_large_mean",
  ),
  "Norms: other rows, padding": row(
    "no token sees another; a batch norm's do",
    "test_norm.py::test_no_token_sees_another",
    "nn/test_decoding.py::test_right_padded_rows_of_several_lengths",
  ),
}
DEEPNET = {
  "DeepNet: coefficients": row(
    "the printed ones, encoder-decoder included",
    "test_wiring.py::test_published_coefficients",
    "test_wiring.py::test_coefficients_of_an_encoder_decoder",
  ),
  "DeepNet: initialisation": row(
    "six matrices at gain beta or 1", "test_wiring.py::test_deepnorm_starts_as_xavier_with_gain_beta"
  ),
  "DeepNet: update size": row(
    "flat from 4 to 64 layers for the optimizer that the coefficients are for, and not for the other; pre-norm grows",
    "test_wiring.py::test_the_update_of_deepnorm_does_not_grow_for_the_optimizer_it_was_made_for",
    "test_wiring.py::test_the_update_of_pre_norm_grows",
  ),
  "DeepNet: 64 layers without a warm-up": row(
    "after 100 steps post-norm is above 3.0 nats, and both DeepNorms 0.3 below it (a slow test)",
    "train/test_depth.py::test_deepnorm_trains_where_post_norm_does_not",
  ),
  "DeepNet: alpha = beta = 1": row(
    "is post-norm, bit for bit", "test_wiring.py::test_alpha_and_beta_of_1_are_post_norm"
  ),
}
GATES = {
  "Activations: values": row(
    "torch's to 1e-6, extrema, gaps between the forms of GELU, gradients and those at 0",
    "parity/test_mlps.py::test_activations",
    "test_activation.py::test_values_and_gradients",
    "test_activation.py::test_gradients_at_zero",
    "test_activation.py::test_the_lowest_value",
    "test_activation.py::test_how_far_the_approximations_of_gelu_are_off",
  ),
  "Gates: formulas": row(
    "each variant in NumPy; LlamaMLP and T5DenseGatedActDense",
    "test_activation.py::test_gated_layers",
    "test_layer_properties.py::test_gated_layers",
    "parity/test_mlps.py::test_layers",
  ),
  "Gates: parameters": row(
    "three matrices of 2048 have those of two of 3072",
    "test_activation.py::test_a_gated_layer_of_two_thirds_has_the_parameters_of_a_plain_one",
  ),
  "Gates: Llama's width": row(
    "4096 gives 11008, 5120 13824, 8192 22016", "test_activation.py::test_the_width_of_llama"
  ),
  "Gates: fused weights": row(
    "one weight is two, by a stated order",
    "test_activation.py::test_a_fused_weight_is_two_weights",
    "test_activation.py::test_the_activated_half_matters",
  ),
  "Gates: half types": row("no NaN at 6e4", "test_activation.py::test_half_types_at_their_end"),
}
SECTIONS = (GLM, ROPE, BETA, ALIBI, PRECISION, NORMS, DEEPNET, GATES)
TABLE = {name: one for section in SECTIONS for name, one in section.items()}


@functools.cache
def functions(path):
  """Names of what a test file runs: its test functions, and the bugs that test_sabotage.py makes."""
  found = set()
  for node in ast.parse((TESTS / path).read_text()).body:
    if isinstance(node, ast.FunctionDef):
      made = [
        d.func.id for d in node.decorator_list if isinstance(d, ast.Call) and isinstance(d.func, ast.Name)
      ]
      found |= {node.name} if node.name.startswith("test_") or "bug" in made else set()
  return found


def problems(one):
  """What is wrong with a row."""
  wrong = [] if one.says else ["it says nothing"]
  if not (one.tests or one.reason):
    wrong.append("neither a test nor a reason")
  for test in one.tests:
    path, _, name = test.partition("::")
    if not (TESTS / path).is_file():
      wrong.append(f"no file {path}")
    elif name not in functions(path):
      wrong.append(f"no test {test}")
  return wrong


@pytest.mark.core
def test_every_check_has_a_test_or_a_reason():
  assert len(TABLE) == sum(map(len, SECTIONS))  # no name twice
  assert not {name: wrong for name, one in TABLE.items() if (wrong := problems(one))}


@pytest.mark.parametrize(
  ("bad", "problem"),
  [
    (row("something"), "neither a test nor a reason"),
    (row("", reason="none"), "it says nothing"),
    (row("something", "test_nothing.py::test_it"), "no file test_nothing.py"),
    (row("something", "test_norm.py::test_nothing"), "no test test_norm.py::test_nothing"),
    (row("something", "test_norm.py::normed"), "no test test_norm.py::normed"),  # a helper
  ],
)
def test_a_row_without_proof_is_found(bad, problem):
  assert problems(bad) == [problem]
