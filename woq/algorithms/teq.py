"""TEQ experiment."""
from __future__ import annotations
import torch
from torch import nn
from woq.algorithms.awq import Awq, block_round, K as AK
from woq.algorithms.base import LayerResult, float_weight
from woq.algorithms.hessian import SecondMoment, relative_error
from woq.blocks import linears, weight_of, write_back
from woq.folds import FoldFinder, Folds
from woq.replay import BlockInputs, input_groups, observe, run_batch, BlockCall, first_tensor, call_block, _to
from transformers.pytorch_utils import Conv1D

T = dict(init="awq", lr=1e-2, iters=50, obj="block", clip=True, refresh=0, samples=8)


class Teq(Awq):
    def quantize_block(self, block, specs, inputs):
        modules = linears(block)
        groups = input_groups(block, list(specs), inputs)
        moments = {g[0]: SecondMoment.zeros(specs[g[0]].in_features, inputs.device) for g in groups}
        observe(block, list(moments), inputs, lambda name, x: moments[name].add(name, x))
        H = {n: moments[g[0]].normalized() for g in groups for n in g}
        folds = self.finder.find(block, list(specs), inputs).kept
        W = {n: weight_of(modules[n]).float().clone() for n in specs}
        init = [torch.ones(f.channels, device=inputs.device) for f in folds]
        if T["init"] == "awq":
            init = [self._scale(f, [(W[n], H[n], specs[n]) for n in f.consumers if n in specs]) for f in folds]
        owner = {n: i for i, f in enumerate(folds) for n in f.consumers if n in specs}
        def e_of(n, s):
            i = owner.get(n)
            return None if i is None else s[i][folds[i].source]
        def ratios(s):
            out = {}
            for n, sp in specs.items():
                e = e_of(n, s); w = W[n] if e is None else W[n] * e
                h = H[n] if e is None else H[n] / (e[:, None] * e)
                q = block_round(w, h, sp)
                g = w.view(len(w), -1, sp.group_size)
                lo, hi = g.amin(-1).clamp(max=0), g.amax(-1).clamp(min=0)
                sc, z = q.scales.float(), q.zeros.float()
                out[n] = ((sc * z / -lo.clamp(max=-1e-8)).clamp(0.2, 1.2), (sc * (2**sp.bits - 1 - z) / hi.clamp(min=1e-8)).clamp(.2, 1.2), q)
            return out
        def true_weights(s):
            r = ratios(s); out = {}
            for n in specs:
                e = e_of(n, s); d = r[n][2].dequantize()
                out[n] = d if e is None else d / e
            return out
        R = ratios(init)
        def fq(w, sp, r):
            g = w.view(len(w), -1, sp.group_size)
            lo = (g.amin(-1).clamp(max=0) * r[0])[..., None]; hi = (g.amax(-1).clamp(min=0) * r[1])[..., None]
            m = 2 ** sp.bits - 1
            sc = ((hi - lo) / m).clamp(min=1e-8)
            z = -lo / sc
            z = z + (z.round() - z).detach()
            x = g / sc
            q = x + (x.round() - x).detach() + z
            q = q.clamp(0, m)
            return ((q - z) * sc).view_as(w)
        def weights(s):
            out = {}
            for n, sp in specs.items():
                e = e_of(n, s)
                if e is None: 
                    with torch.no_grad(): out[n] = fq(W[n], sp, R[n])
                else: out[n] = fq(W[n] * e, sp, R[n]) / e
            return out
        nb = len(inputs.hidden)
        dev = inputs.device
        def out(i, ws, rows=slice(None)):
            call = inputs.calls[i]
            here = BlockCall(_to(call.args, dev), _to(call.kwargs, dev), call.hidden_by_keyword)
            ps = {f"{n}.weight": (w.t() if isinstance(modules[n], Conv1D) else w) for n, w in ws.items()}
            h = inputs.hidden[i][rows].to(dev)
            args = () if here.hidden_by_keyword else (h, *here.args)
            kw = {**here.kwargs, **({"hidden_states": h} if here.hidden_by_keyword else {})}
            return first_tensor(torch.func.functional_call(block, ps, args, kw))
        with torch.no_grad():
            target = [run_batch(block, inputs, i) for i in range(nb)]
            base = sum(float((t - h).square().mean()) for t, h in zip(target, inputs.hidden)) / nb
        held = [nb - 1]
        def measure(s):
            with torch.no_grad():
                ws = true_weights(s)
                return sum(float((out(i, ws) - target[i]).square().mean()) for i in held) / len(held) / base
        t = [x.log().clone().requires_grad_() for x in init]
        opt = torch.optim.Adam(t, lr=T["lr"]) if t else None
        it = T["iters"]
        ones = [torch.ones_like(x) for x in init]
        cands = [(measure(ones), ones), (measure(init), init)]
        if t:
            sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 - k / it)
            gen = torch.Generator().manual_seed(0)
            for k in range(it):
                with torch.enable_grad():
                    s = [x.exp() for x in t]
                    if T["refresh"] and k and k % T["refresh"] == 0:
                        with torch.no_grad(): R = ratios([x.detach() for x in s])
                    ws = weights(s)
                    if T["obj"] == "block":
                        i = int(torch.randint(nb - 1, (1,), generator=gen))
                        rows = torch.randperm(len(inputs.hidden[i]), generator=gen)[:T["samples"]]
                        loss = (out(i, ws, rows) - target[i][rows]).square().mean() / base
                    else:
                        loss = 0
                        for n in owner:
                            d = ws[n] - W[n]
                            loss = loss + ((d @ H[n]) * d).sum() / ((W[n] @ H[n]) * W[n]).sum()
                    opt.zero_grad(); loss.backward(); opt.step(); sched.step()
            final = [x.detach().exp() for x in t]
            cands.append((measure(final), final))
        if T.get("say"): print(["%.5f" % c[0] for c in cands])
        best = min(cands, key=lambda c: c[0])[1]
        for f, s in zip(folds, best):
            s = f.apply(block, s)
            e = s[f.source]
            for n in f.consumers:
                if n in specs: H[n] = H[n] / (e[:, None] * e)
        results = {}
        for n in specs:
            w = float_weight(n, weight_of(modules[n]))
            q = self._round(w, H[n], specs[n])
            results[n] = LayerResult(q, relative_error(w, q.dequantize(), H[n]), 1)
        for n in specs:
            write_back(modules[n], results[n].weight.dequantize())
        return results
