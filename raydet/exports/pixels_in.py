"""The graph of a detector with everything around it: pixels of pictures → boxes, scores and labels.

The graph resizes as the model's image processor does, with antialiasing, normalises, runs the model and keeps its best
detections. The tracing exporter has no antialiased resize, so the steps before and after the model are added as nodes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from raydet.common.errors import UserError
from raydet.models.detector import Detector
from raydet.models.geometry import ResizeRule
from raydet.models.graph import input_names

OPSET = 18
"""The first with an antialiased `Resize`."""
PIXELS = "pixels"
"""Name of the input: RGB, uint8 [B, height, width, 3], pictures of one size."""
DETECTIONS = ("boxes_xyxy", "scores", "labels")
"""Names of the outputs, the best first: float32 [B, K, 4] in pixels of the picture, float32 [B, K], int64 [B, K]."""

_MODES = {2: 'mode = "linear"', 3: 'mode = "cubic", cubic_coeff_a = -0.5'}
"""Attributes of `Resize` by PIL's resampling code; PIL's bicubic has the coefficient -0.5."""
_HEADER = f'<ir_version: 8, opset_import: ["" : {OPSET}]>'


def with_pixels_in(core: bytes, detector: Detector) -> Any:
    """Put the steps before and after a model around its graph, and return an `onnx.ModelProto`.

    Args:
        core: Content of the ONNX file that `to_onnx` makes.
        detector: The detector of the graph.

    Raises:
        UserError: The image processor resamples in a way that ONNX does not have.
    """
    import onnx
    from onnx import compose, parser, version_converter

    newer = version_converter.convert_version(onnx.load_from_string(core), OPSET)
    inner = compose.add_prefix(newer, "model/", rename_inputs=False, rename_outputs=False)
    inner.ir_version = 8
    before = parser.parse_model(_before(detector))
    after = parser.parse_model(_after(detector))
    names = input_names(detector)
    whole = compose.merge_models(
        before, inner, io_map=[(name, name) for name in names], outputs=["logits", "pred_boxes", "sides"]
    )
    whole = compose.merge_models(
        whole, after, io_map=[("logits", "logits"), ("pred_boxes", "pred_boxes"), ("sides", "sides")]
    )
    onnx.helper.set_model_props(whole, {item.key: item.value for item in inner.metadata_props})
    onnx.checker.check_model(whole)
    return whole


def _before(detector: Detector) -> str:
    """Return the text of a model: pixels → the inputs of the detector, and `sides`, those of the picture, float [4]."""
    rule, names = detector.resize_rule, input_names(detector)
    if rule.resample not in _MODES:
        raise UserError("--pixels-in: the image processor resamples in a way that ONNX lacks; omit the option")
    # In two passes with whole levels between them, as PIL resizes.
    resize = f"{_MODES[rule.resample]}, antialias = 1, exclude_outside = 1"
    mean, std = detector.mean_and_std()
    outputs = ["float[batch, 3, h, w] pixel_values"]
    outputs += ["int64[batch, h, w] pixel_mask"] if "pixel_mask" in names else []
    return f"""
{_HEADER}
before (uint8[batch, height, width, 3] {PIXELS}) => ({", ".join(outputs)}, float[4] sides)
<float[1, 3, 1, 1] mean = {{{_numbers(mean)}}}, float[1, 3, 1, 1] std = {{{_numbers(std)}}}>
{{
  size = Shape({PIXELS})
  first = Constant<value = int64[1] {{0}}>()
  one = Constant<value = int64[1] {{1}}>()
  two = Constant<value = int64[1] {{2}}>()
  three = Constant<value = int64[1] {{3}}>()
  num_images = Gather(size, first)
  h = Gather(size, one)
  w = Gather(size, two)
  wide_high = Concat<axis = 0>(w, h, w, h)
  sides = Cast<to = 1>(wide_high)
{_target(rule)}
  planes = Transpose<perm = [0, 3, 1, 2]>({PIXELS})
  numbers = Cast<to = 1>(planes)
  rounding = Constant<value = float {{0.5}}>()
  low = Constant<value = float {{0.0}}>()
  high = Constant<value = float {{255.0}}>()
  narrowed = Concat<axis = 0>(num_images, three, h, new_w)
  across = Resize<{resize}>(numbers, , , narrowed)
  across_half = Add(across, rounding)
  across_whole = Floor(across_half)
  across_levels = Clip(across_whole, low, high)
  target = Concat<axis = 0>(num_images, three, new_h, new_w)
  down = Resize<{resize}>(across_levels, , , target)
  down_half = Add(down, rounding)
  down_whole = Floor(down_half)
  levels = Clip(down_whole, low, high)
  centred = Sub(levels, mean)
{_padded(rule, has_mask="pixel_mask" in names)}
}}
"""


def _target(rule: ResizeRule) -> str:
    """Return nodes for `new_h` and `new_w`, int64 [1], from `h` and `w`; the arithmetic is that of `ResizeRule`."""
    if rule.mode == "fixed":
        assert rule.size_hw is not None, "a fixed rule has a size"
        height, width = rule.size_hw
        return f"""
  new_h = Constant<value = int64[1] {{{height}}}>()
  new_w = Constant<value = int64[1] {{{width}}}>()"""
    shared = """
  exact_h = Cast<to = 11>(h)
  exact_w = Cast<to = 11>(w)"""
    if rule.limit_hw is not None:
        return f"""{shared}
  limit_h = Constant<value = double[1] {{{float(rule.limit_hw[0])}}}>()
  limit_w = Constant<value = double[1] {{{float(rule.limit_hw[1])}}}>()
  scale_h = Div(limit_h, exact_h)
  scale_w = Div(limit_w, exact_w)
  scale = Min(scale_h, scale_w)
  scaled_h = Mul(exact_h, scale)
  scaled_w = Mul(exact_w, scale)
  whole_h = Cast<to = 7>(scaled_h)
  whole_w = Cast<to = 7>(scaled_w)
  new_h = Max(whole_h, one)
  new_w = Max(whole_w, one)"""
    return f"""{shared}
  shortest = Constant<value = double[1] {{{float(rule.shortest or 0)}}}>()
  longest = Constant<value = double[1] {{{float(rule.longest or 0)}}}>()
  multiple = Constant<value = int64[1] {{{rule.multiple_of}}}>()
  short = Min(exact_h, exact_w)
  long = Max(exact_h, exact_w)
  ratio = Div(long, short)
  long_if_free = Mul(ratio, shortest)
  is_bounded = Greater(long_if_free, longest)
  longest_short = Mul(longest, short)
  bounded_short = Div(longest_short, long)
  round_short = Round(bounded_short)
  exact_short = Where(is_bounded, bounded_short, shortest)
  new_short_exact = Where(is_bounded, round_short, shortest)
  new_short = Cast<to = 7>(new_short_exact)
  fits = Equal(short, new_short_exact)
  is_portrait = Greater(exact_h, exact_w)
  is_wide = Not(is_portrait)
  unchanged = {"And(fits, is_wide)" if rule.multiple_of > 1 else "Identity(fits)"}
  product_h = Mul(exact_short, exact_h)
  product_w = Mul(exact_short, exact_w)
  quotient_h = Div(product_h, exact_w)
  quotient_w = Div(product_w, exact_h)
  long_h = Cast<to = 7>(quotient_h)
  long_w = Cast<to = 7>(quotient_w)
  turned_h = Where(is_portrait, long_h, new_short)
  turned_w = Where(is_portrait, new_short, long_w)
  chosen_h = Where(unchanged, h, turned_h)
  chosen_w = Where(unchanged, w, turned_w)
  rest_h = Mod(chosen_h, multiple)
  rest_w = Mod(chosen_w, multiple)
  whole_h = Sub(chosen_h, rest_h)
  whole_w = Sub(chosen_w, rest_w)
  new_h = Max(whole_h, multiple)
  new_w = Max(whole_w, multiple)"""


def _padded(rule: ResizeRule, *, has_mask: bool) -> str:
    """Return nodes for `pixel_values` and, if the model has one, `pixel_mask`."""
    ones = """
  mask_size = Concat<axis = 0>(num_images, new_h, new_w)
  {} = ConstantOfShape<value = int64[1] {{1}}>(mask_size)"""
    if rule.pad_to_hw is None:
        return "  pixel_values = Div(centred, std)" + (ones.format("pixel_mask") if has_mask else "")
    height, width = rule.pad_to_hw
    values = f"""
  normalised = Div(centred, std)
  full_h = Constant<value = int64[1] {{{height}}}>()
  full_w = Constant<value = int64[1] {{{width}}}>()
  below = Sub(full_h, new_h)
  right = Sub(full_w, new_w)
  pads = Concat<axis = 0>(first, first, first, first, first, first, below, right)
  pixel_values = Pad(normalised, pads)"""
    if has_mask:
        values += ones.format("ones")
        values += """
  mask_pads = Concat<axis = 0>(first, first, first, first, below, right)
  pixel_mask = Pad(ones, mask_pads)"""
    return values


def _after(detector: Detector) -> str:
    """Return the text of a model: outputs and sides of the picture → detections, as `best_detections` has them."""
    family, num_queries = detector.family, detector.num_queries
    if family.softmax:
        best = f"""
  probabilities = Softmax<axis = -1>(logits)
  start = Constant<value = int64[1] {{0}}>()
  end = Constant<value = int64[1] {{-1}}>()
  axis = Constant<value = int64[1] {{2}}>()
  class_scores = Slice(probabilities, start, end, axis)
  query_scores = ReduceMax<keepdims = 0>(class_scores, axis)
  query_labels = ArgMax<axis = 2, keepdims = 0>(class_scores)
  num_best = Constant<value = int64[1] {{{num_queries}}}>()
  scores, queries = TopK<axis = 1>(query_scores, num_best)
  labels = GatherElements<axis = 1>(query_labels, queries)"""
    else:
        num_classes = len(detector.categories)
        best = f"""
  class_scores = Sigmoid(logits)
  flat_shape = Constant<value = int64[2] {{0, -1}}>()
  flat = Reshape(class_scores, flat_shape)
  num_best = Constant<value = int64[1] {{{min(family.top_k or num_queries, num_queries * num_classes)}}}>()
  scores, index = TopK<axis = 1>(flat, num_best)
  num_classes = Constant<value = int64 {{{num_classes}}}>()
  labels = Mod(index, num_classes)
  queries = Div(index, num_classes)"""
    return f"""
{_HEADER}
after (float[batch, num_queries, num_logits] logits, float[batch, num_queries, 4] pred_boxes, float[4] sides)
  => (float[batch, best, 4] boxes_xyxy, float[batch, best] scores, int64[batch, best] labels)
{{{best}
  last = Constant<value = int64[1] {{2}}>()
  places = Unsqueeze(queries, last)
  boxes = GatherND<batch_dims = 1>(pred_boxes, places)
  centres, whole_sides = Split<axis = 2, num_outputs = 2>(boxes)
  half = Constant<value = float {{0.5}}>()
  half_sides = Mul(whole_sides, half)
  starts = Sub(centres, half_sides)
  ends = Add(centres, half_sides)
  corners = Concat<axis = 2>(starts, ends)
  boxes_xyxy = Mul(corners, sides)
}}
"""


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(repr(float(np.float32(value))) for value in values)
