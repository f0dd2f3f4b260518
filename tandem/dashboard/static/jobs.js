// The list of jobs.

import { away, get, repeat, tell } from './api.js'
import { age, badge, h, progress } from './dom.js'
import { EnginePanel } from './engine.js'

const STATES = ['QUEUED', 'STARTING', 'RUNNING', 'RETRYING', 'CANCELLING', 'CANCELLED', 'SUCCEEDED', 'FAILED', 'DELETING']
const PAGE = 50
const MOST = 1000
const EVERY_MS = 2000

export class JobsPage {
  constructor (root) {
    this.limit = PAGE
    this.shown = ''
    this.select = h('select', { id: 'state', onchange: () => this.load() },
      h('option', { value: '' }, 'all'), STATES.map(state => h('option', { value: state }, state)))
    this.body = h('tbody')
    this.empty = h('p', { class: 'empty' }, 'Loading.')
    this.more = h('button', { hidden: true, onclick: () => { this.limit = Math.min(this.limit + PAGE, MOST); this.load() } },
      'Show more')
    const names = ['Job', 'State', 'Algorithm', 'Steps', 'Submitted', 'Reason']
    const engine = h('section', { class: 'card', 'aria-label': 'Inference service' }, h('h2', {}, 'Inference service'))
    root.append(
      h('div', { class: 'bar' }, h('h1', {}, 'Jobs'), h('label', { for: 'state' }, 'State'), this.select),
      h('table', { class: 'jobs' }, h('thead', {}, h('tr', {}, names.map(name => h('th', { scope: 'col' }, name)))), this.body),
      this.empty, this.more, engine)
    this.engine = new EnginePanel(engine, '/api/engines')
    this.stop = repeat(EVERY_MS, () => this.load())
  }

  close () {
    this.stop()
    this.engine.close()
  }

  async load () {
    const state = this.select.value
    try {
      const query = new URLSearchParams({ limit: this.limit, ...(state ? { state } : {}) })
      const found = await get(`/api/jobs?${query}`)
      if (state !== this.select.value) return
      tell('trainer', null)
      this.show(found)
    } catch (error) {
      tell('trainer', away(error) ? `The trainer service does not answer: ${error.message}. Trying again.` : error.message)
      if (!this.body.children.length) this.empty.textContent = 'Nothing is known of any jobs.'
    }
  }

  show ({ jobs, more }) {
    this.more.hidden = !more || this.limit >= MOST
    this.empty.hidden = jobs.length > 0
    this.empty.textContent = 'There are no jobs. Submit one with: tandem submit job.toml'
    // Rows are changed in place, so that whoever stands on one with the keyboard stays there.
    const rows = new Map([...this.body.children].map(row => [row.dataset.id, row]))
    let place = this.body.firstChild
    for (const job of jobs) {
      const told = JSON.stringify([job.state, job.step, job.max_steps, job.reason, age(job.create_time)])
      let row = rows.get(job.id)
      rows.delete(job.id)
      if (!row) {
        row = h('tr', { 'data-id': job.id })
        row.append(h('td', { 'data-name': 'Job' }, h('a', { href: `#/jobs/${encodeURIComponent(job.id)}` }, job.id)))
      }
      if (row.dataset.told !== told) {
        row.dataset.told = told
        while (row.children.length > 1) row.lastChild.remove()
        row.append(
          h('td', { 'data-name': 'State' }, badge(job.state)),
          h('td', { 'data-name': 'Algorithm' }, job.algorithm),
          h('td', { 'data-name': 'Steps' }, progress(job.step, job.max_steps)),
          h('td', { 'data-name': 'Submitted' }, h('time', { datetime: job.create_time, title: job.create_time }, age(job.create_time))),
          h('td', { 'data-name': 'Reason', class: 'reason' }, job.reason))
      }
      if (row === place) place = place.nextSibling
      else this.body.insertBefore(row, place)
    }
    for (const row of rows.values()) row.remove()
  }
}
