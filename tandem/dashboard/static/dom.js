// Elements, and figures as people read them. Text is always set as text: what jobs wrote never becomes markup.

const SVG = 'http://www.w3.org/2000/svg'

// An element with attributes and children. A name that begins with "on" is a listener's.
export function h (tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children)
}

// The same for SVG.
export function s (tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children)
}

function filled (element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value)
    else if (value === true) element.setAttribute(name, '')
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value)
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined))
  return element
}

export function badge (state) {
  return h('span', { class: `badge ${state.toLowerCase().replace(/[^a-z]/g, '')}` }, state)
}

export function progress (step, most) {
  const told = `${step}/${most || '?'}`
  const bar = most ? h('progress', { max: most, value: Math.min(step, most), 'aria-label': `step ${told}` }) : null
  return h('span', { class: 'progress' }, bar, h('span', { class: 'figure' }, told))
}

// A number in at most about six characters.
export function figure (value) {
  if (!Number.isFinite(value)) return String(value)
  const size = Math.abs(value)
  if (size >= 1e6 || (size > 0 && size < 1e-4)) return value.toExponential(2)
  if (size >= 1000 || Number.isInteger(value)) return Math.round(value).toLocaleString('en')
  return String(Number(value.toPrecision(4)))
}

export function bytes (count) {
  for (const [unit, size] of [['GB', 1e9], ['MB', 1e6], ['kB', 1e3]]) {
    if (count >= size) return `${(count / size).toFixed(1)} ${unit}`
  }
  return `${count} B`
}

export function span (seconds) {
  for (const [unit, size] of [['d', 86400], ['h', 3600], ['m', 60]]) {
    if (seconds >= size) return `${Math.floor(seconds / size)} ${unit}`
  }
  return `${Math.max(0, Math.floor(seconds))} s`
}

export function age (time) {
  return `${span((Date.now() - Date.parse(time)) / 1000)} ago`
}

export function clock (time) {
  return h('time', { datetime: time, title: time }, new Date(time).toLocaleTimeString('en-GB'))
}
