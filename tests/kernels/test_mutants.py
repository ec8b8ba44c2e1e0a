"""Hand-made faults of every kernel family, each a small change of its code, are noticed by the family's tests.

What the interpreter cannot show is not here: 32-bit products of rows and strides, missing barriers.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# All that the tests of a kernel family import.
PARTS = ("pyproject.toml", "kernels/*.py", "tests/__init__.py", "tests/conftest.py", "tests/kernels/*.py")

# The examples of tests/conftest.py, without the minutes that hypothesis takes to find the smallest that fails.
UNSHRUNK = """
from hypothesis import Phase, settings

settings.register_profile("unshrunk", deadline=None, derandomize=True, max_examples=25, phases=[Phase.generate])
"""

# What stands in kernels/<family>.py, and what stands there in the mutant.
MUTANTS: dict[str, tuple[tuple[str, str], ...]] = {
    "rms_norm": (
        ("F.rms_norm(x, w.shape, w, eps)", "F.rms_norm(x, w.shape, w)"),
        (
            "h = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0)",
            "h = tl.load(x_ptr + row * x_stride + column, mask=mask, other=1.0)",
        ),
        (
            "h = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0)",
            "h = tl.load(x_ptr + row * x_stride + column, mask=row < num_rows, other=0.0)",
        ),
        ("tl.sum(h * h, axis=1)", "tl.sum((h * h).to(x_ptr.dtype.element_ty).to(SUM), axis=1)"),
        ("tl.sum(h * h, axis=1) / width + eps", "tl.sum(h * h, axis=1) / width"),
        ("tl.sum(h * h, axis=1) / width + eps", "tl.sum(h * h, axis=1) / BLOCK + eps"),
        ("x_ptr + row * x_stride + column", "x_ptr + row * width + column"),
        ("residual_ptr + row * residual_stride", "residual_ptr + row * x_stride"),
        ("        h = h_stored.to(SUM)\n", ""),
        ("dy_ptr + row * dy_stride", "dy_ptr + row * width"),
        ("h_ptr + row * h_stride + column", "h_ptr + row * width + column"),
        ("dh_ptr + row * dh_stride", "dh_ptr + row * dy_stride"),
        ("dx = rstd * (g - n *", "dx = rstd * (g + n *"),
        ("tl.sum(g * n, axis=1)[:, None] / width", "tl.sum(g * n, axis=1)[:, None]"),
        ("return dx, dx if ctx.has_residual else None, dw, None", "return dx, dh, dw, None"),
        ("return dh, dh, None, None", "return None, None, None, None"),
        ("dw += tl.sum(dy * n, axis=0)", "dw = tl.sum(dy * n, axis=0)"),
        ("tl.program_id(0).to(tl.int64) + i * tl.num_programs(0)", "tl.program_id(0).to(tl.int64) + i"),
        ("TILES=-(-num_tiles // num_programs)", "TILES=num_tiles // num_programs"),
        ("_backward_kernel[(num_programs,)](", "_backward_kernel[(min(num_programs, num_rows),)]("),
        ("partial_dw_PN.sum(dim=0)", "partial_dw_PN[0]"),
        ("HAS_DH=dh is not None, IN_FP64=h.dtype == torch.float64", "HAS_DH=dh is not None, IN_FP64=False"),
        (
            "x.new_empty(x.numel() // max(1, x.shape[-1]), dtype=sum_dtype(x))",
            "x.new_empty(x.numel() // max(1, x.shape[-1]))",
        ),
    ),
    "rope": (
        ("rotated = a * cos - b * sin, b * cos + a * sin", "rotated = a * cos + b * sin, b * cos - a * sin"),
        ("q_a * cos - q_b * sin", "q_a * cos + q_b * sin"),
        ("k_b * cos + k_a * sin", "k_b * cos - k_a * sin"),
        ("        sin = -sin\n", "        cos = -cos\n"),
        ("ctx.interleaved, not ctx.inverse)", "ctx.interleaved, ctx.inverse)"),
        ("cos, sin, interleaved, inverse=False)", "cos, sin, False, inverse=False)"),
        ("table = position.to(tl.int64) * HALF + half", "table = (position + sequence).to(tl.int64) * HALF + half"),
        ("in_sequence = position < length", "in_sequence = row < length"),
        ("q_ptr + row * q_stride", "q_ptr + row * k_stride"),
        ("v_ptr + row * v_stride", "v_ptr + row * v_out_stride"),
        ("v_out_ptr + row * v_out_stride", "v_out_ptr + row * (KV_HEADS * 2 * HALF)"),
        ("        tl.store(v_out_ptr + row * v_out_stride + v_offset, v, mask=v_mask)\n", ""),
        ("BLOCK_KV_HEADS=block_kv_heads", "BLOCK_KV_HEADS=1"),
        ("tl.load(head_ptr + half + HALF,", "tl.load(head_ptr + half + BLOCK_HALF,"),
        ("tl.join(a, b)", "tl.join(b, a)"),
        (
            "mask=in_sequence & (half < HALF), other=0.0).to(SUM)\n    if INVERSE",
            "mask=in_sequence & (half < HALF), other=0.0).to(q_ptr.dtype.element_ty).to(SUM)\n    if INVERSE",
        ),
        ("torch.float64 in (q_MN.dtype, cos_TK.dtype)", "q_MN.dtype == torch.float64"),
        ("cos_TK.contiguous(), sin_TK.contiguous()", "cos_TK, sin_TK"),
        ("-(-length // positions_per_tile)", "max(1, length // positions_per_tile)"),
        (
            "exponent_K = torch.arange(0, head_size, 2, dtype=angle_dtype, device=positions_T.device) / head_size",
            "exponent_K = torch.arange(1, head_size, 2, dtype=angle_dtype, device=positions_T.device) / head_size",
        ),
        ("angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32", "angle_dtype = torch.float32"),
    ),
    "swiglu": (
        ("y = gate * _sigmoid(gate) * up", "y = up * _sigmoid(up) * gate"),
        ("tl.where(z < 0, e, 1.0)", "tl.where(z < 0, 1.0, e)"),
        (
            "e = tl.exp(-tl.abs(z))\n    return tl.where(z < 0, e, 1.0) / (1.0 + e)",
            "e = tl.exp(z)\n    return e / (1.0 + e)",
        ),
        ("dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))", "dgate = dy * up * sigmoid"),
        ("(1.0 + gate * (1.0 - sigmoid))", "(1.0 - gate * (1.0 - sigmoid))"),
        ("dup = dy * gate * sigmoid", "dup = dy * sigmoid"),
        ("y.to(y_ptr.dtype.element_ty), mask=mask", "y.to(y_ptr.dtype.element_ty), mask=mask & (column < width - 1)"),
        (
            "dup.to(gradient_ptr.dtype.element_ty), mask=mask",
            "dup.to(gradient_ptr.dtype.element_ty), mask=mask & (row < num_rows - 1)",
        ),
        ("row * gate_up_stride + column\n    gate =", "row * (2 * width) + column\n    gate ="),
        ("row * gate_up_stride + column\n    dy =", "row * (2 * width) + column\n    dy ="),
        ("dy_ptr + row * dy_stride", "dy_ptr + row * width"),
        (
            "up = tl.load(gate_ptr + width, mask=mask, other=0.0).to(SUM)\n    y =",
            "up = tl.load(gate_ptr + BLOCK, mask=mask, other=0.0).to(SUM)\n    y =",
        ),
        ("tl.store(dgate_ptr, dgate.to", "tl.store(dgate_ptr, dup.to"),
        ("IN_FP64=gate_up.dtype == torch.float64", "IN_FP64=False"),
        ("column_tiles = -(-width // columns)", "column_tiles = max(1, width // columns)"),
        ("-(-num_rows // rows) * column_tiles", "max(1, num_rows // rows) * column_tiles"),
        ("gate, up = gate_up.chunk(2, dim=-1)", "up, gate = gate_up.chunk(2, dim=-1)"),
    ),
    "cross_entropy": (
        (
            "torch.where(targets_M != IGNORE, c_MV.logsumexp(dim=-1).square(), 0.0)",
            "c_MV.logsumexp(dim=-1).square()",
        ),
        (
            'c = tl.where(mask, _capped(logits, soft_cap, IN_FP64), float("-inf"))\n        shift =',
            "c = _capped(logits, soft_cap, IN_FP64)\n        shift =",
        ),
        ("totals = totals * tl.exp(before - shift) +", "totals = totals +"),
        ('shift = tl.where(largest == float("-inf"), 0.0, largest)', "shift = largest"),
        ("following = (i + 1) * BLOCK + column", "following = i * BLOCK + column"),
        ("block = (BLOCKS - 1 - i) * BLOCK + column", "block = (BLOCKS - i) * BLOCK + column"),
        ("total = tl.sum(e, axis=0)", "total = tl.sum(e.to(logits_ptr.dtype.element_ty).to(SUM), axis=0)"),
        ("tl.store(loss_ptr + row, tl.where(is_ignored, 0.0, loss))", "tl.store(loss_ptr + row, loss)"),
        ("return tl.where(is_ignored, 0.0, gradient)", "return gradient"),
        ("total = tl.where(is_inside | is_ignored, total,", "total = tl.where(target < width, total,"),
        ("    loss += z_loss * lse * lse\n", ""),
        ("scale = (1.0 + 2.0 * z_loss * lse) / total", "scale = 1.0 / total"),
        ("((1.0 + 2.0 * z_loss * (shift + tl.log(total))) / total)", "((1.0 + 2.0 * z_loss * tl.log(total)) / total)"),
        ("(shift - logit_sum / width + log_total)", "(shift - logit_sum / BLOCK + log_total)"),
        ("gradient -= label_smoothing / width", "gradient -= label_smoothing"),
        ("p - (1.0 - label_smoothing)", "p - 1.0"),
        ("gradient *= 1.0 - tanh * tanh", "gradient *= 1.0 - tanh"),
        ("tl.where(near < 0.25, y * series, tanh)", "tanh"),
        (
            "target_logit = _capped(tl.load(row_ptr + target, mask=is_inside, other=0.0), soft_cap, IN_FP64)",
            "target_logit = tl.load(row_ptr + target, mask=is_inside, other=0.0).to(SUM)",
        ),
        ("gradient = dloss * _gradient(", "gradient = _gradient("),
        ("dloss_ptr + row * dloss_stride", "dloss_ptr + row"),
        ("logits_ptr + row * logits_stride + column, mask", "logits_ptr + row * width + column, mask"),
        ("gradient_ptr + row * gradient_stride", "gradient_ptr + row * width"),
        ("owner = logits_MV if logits_MV._base is None else logits_MV._base", "owner = logits_MV"),
        ("logits_MV.stride(0) >= width", "logits_MV.stride(0) >= 0"),
        ("torch.log_softmax(logits_MV, dim=-1, dtype=sum_dtype(logits_MV))", "torch.log_softmax(logits_MV, dim=-1)"),
        ("gradient_MV.mul_((is_target_M * grads[0])[:, None])", "gradient_MV.mul_(grads[0][:, None])"),
        ("torch.full_like(index_M1, label_smoothing - 1, dtype=dtype)", "torch.full_like(index_M1, -1, dtype=dtype)"),
        ("lse_M = (c_MV.amax(dim=-1) - log_p_MV.amax(dim=-1))", "lse_M = -log_p_MV.amax(dim=-1)"),
    ),
    "linear_cross_entropy": (
        ("min(start + chunk_rows, num_rows)", "min(start + chunk_rows, num_rows - 1)"),
        ("range(0, num_rows, chunk_rows)", "range(0, max(1, num_rows - chunk_rows + 1), chunk_rows)"),
        ("is_first=start == 0", "is_first=True"),
        ("is_first=start == 0", "is_first=False"),
        (
            "head_VD.new_empty(head_VD.shape if head_gradient else 0, dtype=sum_dtype(head_VD))",
            "head_VD.new_empty(head_VD.shape if head_gradient else 0)",
        ),
        ("logits_CV.T, hidden_MD[rows], is_first", "logits_CV.T, hidden_MD[: rows.stop - start], is_first"),
        (
            "cross_entropy_gradient_(logits_CV, targets_M[rows], **options)",
            "cross_entropy_gradient_(logits_CV, targets_M[: rows.stop - start], **options)",
        ),
        ("cross_entropy_rows(logits_CV, targets_M[rows], **options)", "cross_entropy_rows(logits_CV, targets_M[rows])"),
        (
            "LossOptions(z_loss=z_loss, soft_cap=soft_cap, label_smoothing=label_smoothing)\n    (num_rows",
            "LossOptions(soft_cap=soft_cap, label_smoothing=label_smoothing)\n    (num_rows",
        ),
        (
            "LossOptions(z_loss=z_loss, soft_cap=soft_cap, label_smoothing=label_smoothing)\n        return",
            "LossOptions(z_loss=z_loss, soft_cap=soft_cap)\n        return",
        ),
        ("d_hidden = scaled(d_hidden_MD, dloss)", "d_hidden = d_hidden_MD"),
        ("out=d_hidden_MD[rows]", "out=d_hidden_MD[: rows.stop - start]"),
        ("saved.mul_(factor) if type(saved) is Tensor else saved * factor", "saved * factor"),
        ("        d_head_VD.zero_()\n", "        pass\n"),
        ("hidden_MD.new_empty(min(chunk_rows, num_rows), vocab_size)", "hidden_MD.new_empty(num_rows, vocab_size)"),
        ("for operand in (hidden, head_VD)]", "for operand in (head_VD, hidden)]"),
        ("(1 + hidden_gradient + head_gradient)", "3"),
        ("-(-num_rows // most)", "num_rows // most"),
    ),
    "moe_route": (
        (
            "base_PE = (until_PE - counts_PE).add_(ends_E - until_PE[-1])",
            "base_PE = until_PE + (ends_E - until_PE[-1])",
        ),
        ("tl.cumsum(is_picked, axis=0) - 1)", "tl.cumsum(is_picked, axis=0))"),
        ("(base[None, :] + tl.cumsum(", "(tl.cumsum("),
        ("mask=slot < num_slots, other=-1", "mask=slot < num_slots, other=0"),
        ("offsets[1:].copy_(ends_E)", "offsets[1:].copy_(until_PE[-1])"),
        ("    offsets[:1].zero_()\n", ""),
        ("is_ours = tl.sum(is_picked, axis=1) > 0", "is_ours = slot < num_slots"),
        ("tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)", "tl.arange(0, CHUNK)"),
        ("base_ptr + block * EXPERTS + expert", "base_ptr + block * CHUNK + expert"),
        ("tl.store(slots_ptr + row, slot, mask=is_ours)", "tl.store(slots_ptr + slot, row, mask=is_ours)"),
        ("<= tile[:, None]", "< tile[:, None]"),
        ("(end - start + (HEIGHT - 1)) // HEIGHT", "(end - start) // HEIGHT"),
        ("tl.where(is_tile, row, num_rows)", "row"),
        ("tl.where(is_tile, owner, -1)", "owner"),
        ("picks = picks_MJ.contiguous()", "picks = picks_MJ"),
        ("max(1, -(-picks.numel() // block))", "max(1, picks.numel() // block)"),
        ("// tile_height(num_rows, num_experts)) + num_experts", "// tile_height(num_rows, num_experts))"),
        ("- first_tiles_E1[experts]) * height", "- first_tiles_E1[experts])"),
        ("return _TALL if num_rows >= _LOW * num_experts else _LOW", "return _TALL"),
    ),
    "moe_combine": (
        ("row[:, None] * o_stride", "row[:, None] * width"),
        ("        y += o\n", "        y = o\n"),
        ("tl.static_range(PICKS)", "tl.static_range(1, PICKS)"),
        ("o *= tl.load(weights_ptr", "o += 0 * tl.load(weights_ptr"),
        ("weights_ptr + token * PICKS + pick", "weights_ptr + token * PICKS"),
        ("rows_ptr + token * PICKS + pick", "rows_ptr + token + pick"),
        ("mask = is_token[:, None] & (column < width)", "mask = is_token[:, None] & (column < width - 1)"),
        ("-(-num_tokens // tokens) * column_tiles", "max(1, num_tokens // tokens) * column_tiles"),
        ("column_tiles = -(-width // columns)", "column_tiles = max(1, width // columns)"),
        ("o_RD, rows_MJ = rows_of(o_RD), rows_MJ.contiguous()", "o_RD = rows_of(o_RD)"),
        ("else weights_MJ.contiguous()", "else weights_MJ"),
        ("IN_FP64=o_RD.dtype == torch.float64", "IN_FP64=False"),
        ("y_ptr + token[:, None] * width", "y_ptr + token[:, None] * o_stride"),
        ("else weights_MJ[:, pick, None] * picked_MD", "else picked_MD"),
    ),
    "moe_gemm": (
        ("is_ours = row < tl.load(offsets_ptr + 1 + expert)", "is_ours = row < tl.load(offsets_ptr + 1 + expert) - 1"),
        (
            "return tl.load(ptr) if IS_WHOLE else tl.load(ptr, mask=mask, other=0.0)",
            "return tl.load(ptr) if IS_WHOLE else tl.load(ptr, mask=mask, other=1.0)",
        ),
        ("is_inside = start + k < DEPTH\n        x =", "is_inside = start + k < DEPTH + BLOCK_K\n        x ="),
        ("token[:, None] * x_stride", "token[:, None] * DEPTH"),
        ("row[:, None] * a_stride", "row[:, None] * DEPTH"),
        ("[:, None] * dy_stride", "[:, None] * DEPTH"),
        ("left_row * left_stride", "left_row * HEIGHT"),
        ("right_row * right_stride", "right_row * WIDTH"),
        ("expert * (2 * WIDTH * DEPTH)", "expert * (WIDTH * DEPTH)"),
        ("gate_ptr + WIDTH * DEPTH, mask", "gate_ptr + COLUMNS * DEPTH, mask"),
        ("tl.store(gate_out_ptr + WIDTH, up_stored", "tl.store(gate_out_ptr + COLUMNS, up_stored"),
        ("gate_stored = _rounded(gate, h_ptr, WIDENS)", "gate_stored = gate"),
        ("a = gate * _sigmoid(gate) * up_stored.to(SUM)", "a = up_stored.to(SUM) * _sigmoid(up_stored.to(SUM)) * gate"),
        ("dgate = weight * da * up", "dgate = da * up"),
        ("(1.0 + gate * (1.0 - sigmoid))", "(1.0 - gate * (1.0 - sigmoid))"),
        ("_rounded(weight * da * silu,", "_rounded(da * silu,"),
        ("_rounded(weight * a,", "_rounded(a,"),
        ("return tl.sum(da * a, axis=1)", "return tl.sum(weight * da * a, axis=1)"),
        ("dweight += _hidden_half(", "dweight = _hidden_half("),
        ("partial_PR.sum(dim=0)", "partial_PR[0]"),
        ("partial_ptr + column_tile.to(tl.int64) * num_rows + row", "partial_ptr + row"),
        ("weights_ptr + slot, mask", "weights_ptr + slot // PICKS, mask"),
        ("dispatch.rows.view(-1)).view_as(weights_MJ)", "dispatch.slots).view_as(weights_MJ)"),
        ("_dot(tl.trans(left), right, sums,", "_dot(tl.trans(left), right, tl.zeros_like(sums),"),
        ("is_ours = row < end\n", "is_ours = row < end + 1\n"),
        ("row = begin + start + tl.arange(0, BLOCK_K)", "row = begin + tl.arange(0, BLOCK_K)"),
        (
            "dtype=SUM)\n    # The interpreter",
            "dtype=SUM)\n    if begin == end:\n        return\n    # The interpreter",
        ),
        ("expert.to(tl.int64) * (HEIGHT * WIDTH)", "expert.to(tl.int64) * (HEIGHT * COLUMNS)"),
        ("p.to(tl.int64)[:, None] * WIDTH", "p.to(tl.int64)[:, None] * right_stride"),
        ('"IN_FP64": x.dtype == torch.float64', '"IN_FP64": False'),
        ('"WIDENS": launch.INTERPRETED and x.dtype == torch.bfloat16', '"WIDENS": False'),
        (
            "column_tiles = -(-width // columns)\n    constants",
            "column_tiles = max(1, width // columns)\n    constants",
        ),
        ("row_tiles, column_tiles = -(-height // rows)", "row_tiles, column_tiles = max(1, height // rows)"),
        ("rows_RK, matrix_ENK = rows_of(rows_RK), matrix_ENK.contiguous()", "rows_RK = rows_of(rows_RK)"),
        ("return h_R2F, F.silu(gate_RF) * up_RF", "return h_R2F, F.silu(up_RF) * gate_RF"),
    ),
    "moe": (
        ("weights_MJ[:, :, None] * o_RD[dispatch.rows]", "o_RD[dispatch.rows]"),
        ("x_RD = x_MD[dispatch.slots // weights_MJ.shape[1]]", "x_RD = x_MD[dispatch.slots % x_MD.shape[0]]"),
        ("return launch_combine(o_RD, rows, weights_MJ), h_R2F", "return launch_combine(o_RD, rows, None), h_R2F"),
        ("dx_MD = launch_combine(dx_RD, rows, None)", "dx_MD = launch_combine(dx_RD, rows, weights_MJ)"),
        ("dispatch, gathers_left=True)", "dispatch)"),
        (
            "return dx_MD, dweights_MJ, d_gate_up, d_down, *(None,) * 6",
            "return dx_MD, None, d_gate_up, d_down, *(None,) * 6",
        ),
        ("return 6 * num_tokens", "return 4 * num_tokens"),
        ("products = 1 + 2 * x_gradient", "products = 2 * x_gradient"),
        ("return moe_combine(o_RD, dispatch.rows, weights_MJ)", "return moe_combine(o_RD, dispatch.rows)"),
        ("(weights_R1 * t_RF).to(a_RF.dtype)", "t_RF.to(a_RF.dtype)"),
        ("(weights_R1 * a_RF).to(a_RF.dtype), dispatch)", "a_RF, dispatch)"),
        ("dweights_R.index_select(0, dispatch.rows.view(-1))", "dweights_R.index_select(0, dispatch.slots)"),
        (
            "(dh_R2F, gate_up_E2FD, dispatch), dispatch.rows)",
            "(dh_R2F, gate_up_E2FD, dispatch), dispatch.rows, weights_MJ)",
        ),
        ("return dispatch.slots // dispatch.rows.shape[1]", "return dispatch.slots % dispatch.rows.shape[0]"),
        ("width * x_MD.element_size() % 16", "width % 16"),
        (" or weights_MJ.dtype != sum_dtype(x_MD)", ""),
        ("dispatch.offsets.numel() != num_experts + 1", "dispatch.offsets.numel() > num_experts + 1"),
        ('x_MD.dtype != torch.float64 and runs_triton("moe", x_MD)', 'runs_triton("moe", x_MD)'),
    ),
}


def mutated(family: str, old: str, new: str) -> str:
    """The text of the family's module with one change."""
    text = (ROOT / "kernels" / f"{family}.py").read_text()
    assert text.count(old) == 1, f"the table is out of date: kernels/{family}.py has {old!r} {text.count(old)} times"
    return text.replace(old, new)


def copy_of_the_repository(folder: Path) -> None:
    for file in (file for part in PARTS for file in ROOT.glob(part)):
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    (folder / "unshrunk.py").write_text(UNSHRUNK)


def run_tests_of(family: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the family's tests of the copy in the folder, interpreted, to the first that fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "unshrunk", "--hypothesis-profile", "unshrunk"]
    command += [f"tests/kernels/test_{family}.py", "-m", "not slow and not gpu"]
    # First on the path, before the real repository that is installed.
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=540, check=False
    )


MUTANTS_OF_ALL = [
    pytest.param(family, *mutant, id=f"{family}-{number}")
    for family, mutants in MUTANTS.items()
    for number, mutant in enumerate(mutants)
]


def test_there_are_ten_mutants_of_every_family_and_each_is_python():
    for family, mutants in MUTANTS.items():
        assert len(set(mutants)) == len(mutants) >= 10
        for mutant in mutants:
            compile(mutated(family, *mutant), family, "exec")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", MUTANTS)
def test_without_a_change_the_tests_pass(family: str, tmp_path: Path):
    copy_of_the_repository(tmp_path)
    result = run_tests_of(family, tmp_path)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("family", "old", "new"), MUTANTS_OF_ALL)
def test_every_mutant_is_noticed(family: str, old: str, new: str, tmp_path: Path):
    copy_of_the_repository(tmp_path)
    (tmp_path / "kernels" / f"{family}.py").write_text(mutated(family, old, new))
    result = run_tests_of(family, tmp_path)
    # 1: a test failed. Negative: the interpreter crashed outside its memory. From 2 on, no test of the mutant ran.
    assert result.returncode == 1 or result.returncode < 0, f"{old!r} became {new!r}, and: {result.stdout}"
