// What the dashboard's server is asked, and what is told of those who do not answer.

const PATIENCE_MS = 20_000
const DELETE_MS = 200_000
const problems = new Map()
let csrf = null

// What went wrong, as the server tells it: `reason` for programs, `fields` that are at fault.
export class Failed extends Error {
  constructor (status, error) {
    const fields = (error.violations ?? []).map(one => `${one.field}: ${one.description}`)
    super([error.message, ...fields.filter(text => text !== error.message)].join('; '))
    this.status = status
    this.reason = error.reason
  }
}

export async function get (path) {
  return ask(path, {}, PATIENCE_MS)
}

export async function act (job, action) {
  csrf ??= (await get('/api/session')).csrf
  const options = { method: 'POST', headers: { 'X-CSRF-Token': csrf } }
  return ask(`/api/jobs/${encodeURIComponent(job)}/${action}`, options, action === 'delete' ? DELETE_MS : PATIENCE_MS)
}

async function ask (path, options, patience) {
  let response
  try {
    response = await fetch(path, { ...options, signal: AbortSignal.timeout(patience) })
  } catch (error) {
    tell('dashboard', 'The dashboard itself does not answer. Trying again.')
    throw new Failed(0, { reason: 'UNREACHABLE', message: 'the dashboard does not answer' })
  }
  if (response.status === 403) {
    tell('dashboard', 'The dashboard was started anew, or this address is not its own: open the one that it wrote.')
    throw new Failed(403, (await response.json()).error)
  }
  tell('dashboard', null)
  const answer = await response.json()
  if (!response.ok) throw new Failed(response.status, answer.error)
  return answer
}

// Show, or with null take back, what is wrong with one of those that the page depends on.
export function tell (who, what) {
  if (what === null) problems.delete(who)
  else problems.set(who, what)
  const text = [...problems.values()].join(' ')
  const notice = document.getElementById('notice')
  if (notice.textContent !== text) notice.textContent = text
}

export function away (error) {
  return [0, 502, 503, 504].includes(error.status)
}

// Do something again and again while the page is seen, and once more when it is seen again. Returns what ends it.
export function repeat (every, work) {
  let timer = null
  let over = false
  async function turn () {
    clearTimeout(timer)
    if (document.visibilityState === 'visible') await work()
    if (!over) timer = setTimeout(turn, every)
  }
  const seen = () => { if (document.visibilityState === 'visible') turn() }
  document.addEventListener('visibilitychange', seen)
  turn()
  return () => {
    over = true
    clearTimeout(timer)
    document.removeEventListener('visibilitychange', seen)
  }
}
