"""AWQ experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from woq.algorithms.base import Algorithm, LayerResult, float_weight
from woq.algorithms.hessian import SecondMoment, relative_error
from woq.algorithms.rtn import round_to_nearest
from woq.blocks import linears, weight_of, write_back
from woq.configs import AwqConfig
from woq.folds import Fold, FoldFinder, Folds
from woq.quant import group_params, quantize, dequantize, _factors, _symmetric, _asymmetric
from woq.replay import BlockInputs, input_groups, observe
from woq.weights import QuantizedWeight, WeightSpec

K = dict(search="minmax", imp=True, ratios=20, wstat="none", norm=False, final="block", pow2=False, refine=0, skip=())


class Awq(Algorithm[AwqConfig]):
    needs_data: ClassVar[bool] = True

    def __init__(self, config):
        super().__init__(config)
        self.finder = FoldFinder(config.absorb_layer_dict)

    def quantize_block(self, block, specs, inputs):
        modules = linears(block)
        groups = input_groups(block, list(specs), inputs)
        moments = {g[0]: SecondMoment.zeros(specs[g[0]].in_features, inputs.device) for g in groups}
        observe(block, list(moments), inputs, lambda name, x: moments[name].add(name, x))
        H = {n: moments[g[0]].normalized() for g in groups for n in g}
        folds = self.finder.find(block, list(specs), inputs) if self.config.auto_scale else Folds((), {})
        for fold in folds.kept:
            if any(k in fold.consumers[0] for k in K["skip"]):
                continue
            names = [n for n in fold.consumers if n in specs]
            s = self._scale(fold, [(weight_of(modules[n]).float(), H[n], specs[n]) for n in names])
            s = fold.apply(block, s)
            e = s[fold.source]
            done = {}
            for n in names:
                if id(H[n]) not in done:
                    done[id(H[n])] = H[n] / (e[:, None] * e)
                H[n] = done[id(H[n])]
        results = {}
        for n in specs:
            w = float_weight(n, weight_of(modules[n]))
            q = self._round(w, H[n], specs[n])
            results[n] = LayerResult(q, relative_error(w, q.dequantize(), H[n]), 1)
        for n in specs:
            write_back(modules[n], results[n].weight.dequantize())
        return results

    def _scale(self, fold: Fold, parts):
        x = sum(fold.shared(h.diagonal()) for _, h, _ in parts) / len(parts)
        x = x.sqrt()
        silent = x == 0
        x = torch.where(silent, x[~silent].mean() if (~silent).any() else torch.ones_like(x), x)
        ws = []
        for w, h, spec in parts:
            g = w.abs().view(len(w), -1, spec.group_size)
            ws.append(g / g.amax(-1, keepdim=True).clamp(min=1e-8) if K["wstat"] == "norm" else g)
        wm = fold.shared(torch.cat([g.flatten(1) for g in ws]).mean(0)).clamp(min=1e-6)
        best, best_s = None, None
        n = K["ratios"]
        cands = []
        for i in range(n):
            a = i / n
            cands.append((a, 0.0))
            if K["wstat"] != "none":
                cands.append((a, 1 - a))
            if K["wstat"] == "grid":
                cands += [(a, b) for b in (0.25, 0.5, 0.75)]
        def cost(s):
            e = s[fold.source]
            total = 0.0
            for w, h, spec in parts:
                ww = w * e
                imp = h.diagonal() / e.square() if K["imp"] else None
                q = self._fq(ww, spec, imp) / e
                d = w - q
                c = ((d @ h) * d).sum()
                if K["norm"]:
                    c = c / ((w @ h) * w).sum()
                total += float(c)
            return total
        for a, b in dict.fromkeys(cands):
            s = x.pow(a) / wm.pow(b)
            s = (s / (s.max() * s.min()).sqrt()).clamp(1e-4, 1e4)
            if K["pow2"]:
                s = s.log2().round().exp2()
            t = cost(s)
            if best is None or t < best:
                best, best_s = t, s
        return best_s

    def _fq(self, w, spec, imp):
        search = K["search"]
        if search == "mse":
            return round_to_nearest(w, spec, "mse", imp).dequantize()
        if search == "minmax":
            return round_to_nearest(w, spec, "minmax").dequantize()
        return coarse(w, spec, imp, search)

    def _round(self, w, h, spec):
        if not getattr(self.config, "auto_clip", True):
            return round_to_nearest(w, spec, "minmax")
        if K["final"] == "plain":
            return round_to_nearest(w, spec, "mse")
        if K["final"] == "diag":
            return round_to_nearest(w, spec, "mse", h.diagonal())
        return block_round(w, h, spec)


def coarse(w, spec, imp, shares):
    g = w.view(len(w), -1, spec.group_size)
    f = w.new_tensor([(c, c) for c in shares])
    choose = _symmetric if spec.sym else _asymmetric
    flat = g.reshape(-1, spec.group_size)
    scale, zero = choose(flat, spec.bits, spec.scale_dtype, f)
    d = dequantize(quantize(flat, scale, zero, spec.bits), scale, zero)
    err = (d - flat).square()
    c = imp.view(1, -1, spec.group_size).expand_as(g).reshape(flat.shape)
    best = (err * c).sum(-1, keepdim=True).argmin(0, keepdim=True)
    return d.gather(0, best.expand(1, *flat.shape))[0].view_as(w)


def block_round(w, h, spec, factors=None):
    gs = spec.group_size
    f = w.new_tensor(factors or _factors(spec.bits, spec.sym, "mse"))
    choose = _symmetric if spec.sym else _asymmetric
    rows = max(1, (1 << 18) // (gs * len(f)))
    S, Z, Q = [], [], []
    for start in range(0, w.shape[1], gs):
        hb = h[start:start + gs, start:start + gs].contiguous()
        ss, zz = [], []
        for g in w[:, start:start + gs].split(rows):
            scale, zero = choose(g, spec.bits, spec.scale_dtype, f)
            d = dequantize(quantize(g, scale, zero, spec.bits), scale, zero).sub_(g)
            e = (d.view(-1, gs) @ hb).view_as(d).mul_(d).sum(-1, keepdim=True)
            best = e.argmin(0, keepdim=True)
            ss.append(scale.gather(0, best)[0]); zz.append(zero.gather(0, best)[0])
        ss, zz = torch.cat(ss), torch.cat(zz)
        Q.append(quantize(w[:, start:start + gs], ss, zz, spec.bits)); S.append(ss); Z.append(zz)
    return QuantizedWeight(spec=spec, codes=torch.cat(Q, 1).to(torch.uint8), scales=torch.cat(S, 1).to(spec.scale_dtype), zeros=torch.cat(Z, 1).to(torch.uint8))
