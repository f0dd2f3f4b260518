// How the engine is.

import { get, repeat } from './api.js'
import { badge, figure, h } from './dom.js'

const EVERY_MS = 2000

export class EnginePanel {
  // path: where its state is asked for.
  constructor (root, path) {
    this.path = path
    this.body = h('div', { class: 'engines' }, h('p', { class: 'empty' }, 'Loading.'))
    this.before = new Map() // by engine, tokens and when, for the rate
    root.append(this.body)
    this.stop = repeat(EVERY_MS, () => this.load())
  }

  close () {
    this.stop()
    this.over = true
  }

  async load () {
    try {
      const { engines } = await get(this.path)
      if (!this.over) this.body.replaceChildren(...this.list(engines))
    } catch (error) {
      if (!this.over) this.body.replaceChildren(h('p', { class: 'empty' }, `Not known: ${error.message}.`))
    }
  }

  list (engines) {
    if (!engines.length) return [h('p', { class: 'empty' }, "The job's own engine runs only while the job does.")]
    return engines.map(engine => engine.error ? this.absent(engine) : this.present(engine))
  }

  absent (engine) {
    const why = engine.error.reason === 'UNREACHABLE' ? 'Nobody answers.' : engine.error.message
    return h('div', { class: 'engine' }, h('p', { class: 'address' }, engine.address ?? ''),
      badge('AWAY'), h('p', { class: 'empty' }, why))
  }

  present (engine) {
    const usage = engine.kv_cache_usage
    const hits = engine.prefix_cache_queries ? `${figure(100 * engine.prefix_cache_hits / engine.prefix_cache_queries)} %` : '–'
    const facts = [
      ['Weight version', figure(engine.weight_version)],
      ['Rollouts', `${engine.running} running, ${engine.waiting} waiting`],
      ['KV cache', h('span', { class: 'progress' },
        h('meter', { min: 0, max: 1, high: 0.9, value: usage, 'aria-label': 'share of the KV cache in use' }),
        h('span', { class: 'figure' }, `${(100 * usage).toFixed(1)} %`))],
      ['Tokens/s', this.rate(engine)],
      ['Prefix cache hits', hits],
      ['Updates', `${engine.updates_committed} committed, ${engine.updates_failed} failed`],
      ['Last update stopped it', `${figure(engine.last_update_stopped_ms)} ms`],
      ['Model', engine.model],
      ['Runs', `${engine.dtype}, ${engine.max_model_len} tokens, vLLM ${engine.vllm_version}`],
      ...(engine.loras.length ? [['LoRA', engine.loras.join(', ')]] : [])
    ]
    return h('div', { class: 'engine' }, h('p', { class: 'address' }, engine.address), badge(engine.state),
      engine.reason ? h('p', { class: 'empty' }, engine.reason) : null,
      h('dl', {}, facts.map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, value)))))
  }

  rate (engine) {
    const now = performance.now()
    const before = this.before.get(engine.engine_id)
    this.before.set(engine.engine_id, { tokens: engine.tokens_generated, at: now })
    if (!before || engine.tokens_generated < before.tokens) return '–'
    return figure(Math.round(1000 * (engine.tokens_generated - before.tokens) / (now - before.at)))
  }
}
