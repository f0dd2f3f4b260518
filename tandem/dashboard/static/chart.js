// A curve in SVG, with axes. It is read with the pointer, or focused and with the arrow keys.

import { figure, h, s } from './dom.js'

const HEIGHT = 170
const LEFT = 52
const RIGHT = 10
const TOP = 8
const BOTTOM = 22
const DOTS = 60 // points up to which each is a dot too

export class Chart {
  // choose: gets the figure's name when another one is picked.
  constructor (name, names, choose) {
    this.name = name
    this.points = []
    this.at = null
    this.svg = s('svg', { role: 'img', tabindex: 0, height: HEIGHT, onkeydown: event => this.key(event), onblur: () => this.mark(null) })
    this.svg.addEventListener('pointermove', event => this.point(event))
    this.svg.addEventListener('pointerleave', () => this.mark(null))
    this.select = h('select', { 'aria-label': 'figure to draw', onchange: () => { choose(this.select.value); this.named(this.select.value) } })
    this.value = h('output', { class: 'value', 'aria-live': 'off' })
    this.element = h('section', { class: 'card chart', 'aria-label': `curve of ${name}` },
      h('div', { class: 'bar' }, this.select, this.value), this.svg)
    this.offer(names)
    this.resized = new ResizeObserver(() => this.draw())
    this.resized.observe(this.svg)
  }

  close () {
    this.resized.disconnect()
  }

  named (name) {
    this.name = name
    this.at = null
    this.element.setAttribute('aria-label', `curve of ${name}`)
  }

  // The figures that can be picked.
  offer (names) {
    const all = names.includes(this.name) ? names : [this.name, ...names]
    if (all.join('\n') === this.offered) return
    this.offered = all.join('\n')
    this.select.replaceChildren(...all.map(name => h('option', { value: name }, name)))
    this.select.value = this.name
  }

  // points: pairs of step and value, by step.
  show (points) {
    this.points = points
    this.draw()
  }

  draw () {
    const width = this.svg.clientWidth
    if (!width) return
    const finite = this.points.filter(([, value]) => Number.isFinite(value))
    this.svg.setAttribute('viewBox', `0 0 ${width} ${HEIGHT}`)
    const last = this.points.at(-1)
    this.tell(last)
    this.svg.setAttribute('aria-label', finite.length
      ? `${this.name}: ${finite.length} points, from ${figure(finite[0][1])} at step ${finite[0][0]} to ${figure(finite.at(-1)[1])} at step ${finite.at(-1)[0]}`
      : `${this.name}: no points yet`)
    if (!finite.length) {
      this.svg.replaceChildren(s('text', { x: width / 2, y: HEIGHT / 2, class: 'none' }, 'no points yet'))
      return
    }
    const values = finite.map(([, value]) => value)
    const ticks = ticksOf(Math.min(...values), Math.max(...values), 4)
    const low = Math.min(ticks[0], ...values)
    const high = Math.max(ticks.at(-1), ...values)
    const from = this.points[0][0]
    const to = Math.max(last[0], from + 1)
    this.x = step => LEFT + (width - LEFT - RIGHT) * (step - from) / (to - from)
    this.y = value => TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)
    const parts = ticks.flatMap(tick => [
      s('line', { class: 'grid', x1: LEFT, x2: width - RIGHT, y1: this.y(tick), y2: this.y(tick) }),
      s('text', { class: 'tick', x: LEFT - 6, y: this.y(tick) + 4, 'text-anchor': 'end' }, figure(tick))
    ])
    for (const tick of ticksOf(from, to, width > 400 ? 6 : 3).filter(step => Number.isInteger(step) && step >= from && step <= to)) {
      parts.push(s('text', { class: 'tick', x: this.x(tick), y: HEIGHT - 6, 'text-anchor': 'middle' }, figure(tick)))
    }
    parts.push(s('path', { class: 'curve', d: this.path() }))
    if (finite.length <= DOTS) {
      parts.push(...finite.map(([step, value]) => s('circle', { class: 'dot', cx: this.x(step), cy: this.y(value), r: 2.5 })))
    }
    this.cursor = s('g', { class: 'cursor' })
    this.svg.replaceChildren(...parts, this.cursor)
    this.mark(this.at)
  }

  // The line, interrupted where a value is no number.
  path () {
    let pen = 'M'
    let text = ''
    for (const [step, value] of this.points) {
      if (!Number.isFinite(value)) pen = 'M'
      else {
        text += `${pen}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`
        pen = 'L'
      }
    }
    return text
  }

  tell (point) {
    this.value.textContent = point ? `${figure(point[1])} at step ${point[0]}` : ''
  }

  mark (index) {
    this.at = index === null ? null : Math.max(0, Math.min(index, this.points.length - 1))
    if (!this.cursor?.isConnected || !this.points.length) return
    if (this.at === null) {
      this.cursor.replaceChildren()
      this.tell(this.points.at(-1))
      return
    }
    const [step, value] = this.points[this.at]
    const x = this.x(step)
    this.cursor.replaceChildren(s('line', { x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }),
      ...(Number.isFinite(value) ? [s('circle', { cx: x, cy: this.y(value), r: 4 })] : []))
    this.tell(this.points[this.at])
  }

  point (event) {
    if (!this.points.length || !this.x) return
    const x = event.clientX - this.svg.getBoundingClientRect().left
    let best = 0
    this.points.forEach(([step], index) => {
      if (Math.abs(this.x(step) - x) < Math.abs(this.x(this.points[best][0]) - x)) best = index
    })
    this.mark(best)
  }

  key (event) {
    const end = this.points.length - 1
    const now = this.at ?? end
    const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: end }[event.key]
    if (next === undefined) return
    event.preventDefault()
    this.value.setAttribute('aria-live', 'polite')
    this.mark(next)
  }
}

// Round numbers that span low to high, about `count` of them.
function ticksOf (low, high, count) {
  if (low === high) {
    const room = Math.abs(low) / 2 || 1
    low -= room
    high += room
  }
  const raw = (high - low) / count
  const size = 10 ** Math.floor(Math.log10(raw))
  const step = size * [1, 2, 5, 10].find(factor => size * factor >= raw * 0.999)
  const first = Math.floor(low / step)
  const found = []
  for (let index = first; (index - 1) * step < high; index++) found.push(Number((index * step).toPrecision(12)))
  return found
}
